"""Adversarial attacks: pure functions over any module that maps [0,1] images to logits."""
