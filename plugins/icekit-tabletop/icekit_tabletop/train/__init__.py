"""Training of the tabletop's three models from rendered scenes alone: `python -m icekit_tabletop.train`."""
