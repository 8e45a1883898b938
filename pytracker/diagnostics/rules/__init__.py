"""The rules that come with pytracker, a family each file. Importing them registers them."""
