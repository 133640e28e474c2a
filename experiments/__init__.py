"""Experiments: one question per folder; each folder's README has its command, its table and what was concluded."""
