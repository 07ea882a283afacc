"""Conversion of models of other architectures to Fastformer's, and back, with equal outputs."""

from fastformer.models.conversion.models import ARCHITECTURES, from_hugging_face, to_hugging_face

__all__ = ["ARCHITECTURES", "from_hugging_face", "to_hugging_face"]
