"""A round as the server sees it: who is asked, what travels, what counts."""
