"""One file for each family of models that PSA supports; `family.py` finds the files by themselves.

A file says by which names ComfyUI recognises the family, where the tokens lie in a call of its models, which preset
`auto` takes, and what PSA cannot do for it. Adding a family touches nothing else.
"""
