"""Recipes: complete studies in one YAML file, checked, planned, run and recorded."""
