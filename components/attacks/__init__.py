"""Adversarial attacks: pure functions over any module that maps [0,1] images to logits.

Nothing is imported here, so that ``components.attacks.spec`` can be read without loading torch.
"""
