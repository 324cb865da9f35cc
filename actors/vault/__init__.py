"""The backup agent in parts: what a backup is made of, where it goes, and how it comes back."""
