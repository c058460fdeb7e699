"""Tiny random models of many families, with their real processor classes where these run without torchvision."""
