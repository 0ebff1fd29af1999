"""Other people's weights and interfaces."""

from vitok.integrations.backbone import backbone
from vitok.integrations.published import load_vitok_v1, load_vitok_v2

__all__ = ["backbone", "load_vitok_v1", "load_vitok_v2"]
