"""Whole latent pipelines: what turns prompts and pictures into what the network reads, and its latents into pictures.

spec.py        what a bundle says of a pipeline's parts
conditions.py  what a call passes, prompts and control images, as the network's conditions
prompts.py     prompts with weights in brackets
tokenizer.py   prompts to token ids, by the `tokenizers` library alone
pictures.py    pictures to arrays and back, and the autoencoder's graphs, in tiles above a size
start.py       where a call begins: noise, a picture (image to image) or a part of one (inpainting)
pipeline.py    `Pipeline`: the parts behind an engine; skipstep.Engine.sample calls it
building.py    what a diffusers folder holds, read and checked without torch
exporting.py   these parts as graphs
modules.py     the parts as torch modules
stand_ins.py   what lets an engine draw in the loop of a diffusers pipeline (skipstep.accelerate)
"""
