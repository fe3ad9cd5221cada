"""Diffusion-DPO and its kin: losses of pairs and of single images, offline and online."""
