"""Pretrained models: found, checked, loaded and given prunable attention."""
