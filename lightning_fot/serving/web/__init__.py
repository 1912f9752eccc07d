"""The page of a server, and what hands it out."""
