"""Model families: the components of a Diffusers pipeline as `policy` and `base` velocity fields.

One file a family. Nothing outside this folder imports Diffusers models, text encoders or peft.
"""
