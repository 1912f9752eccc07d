"""How it is drawn: SVG, labels, charts, PNG figures."""
