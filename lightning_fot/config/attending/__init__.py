"""Ways of attending beside FoT's own: the settings of each, by name, and what each cannot stand beside."""
