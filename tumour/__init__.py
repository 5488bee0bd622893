"""Tumour growth on real anatomy: anatomy, growth, imaging, identification, pictures."""
