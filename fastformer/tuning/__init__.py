"""Measuring on the user's GPU what the shipped defaults can only model."""
