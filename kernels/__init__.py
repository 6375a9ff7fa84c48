"""The expensive places of a language-model policy, each in a file of its own.

    attention.py  causal attention over packed sequences, and over the sampler's cache
    logprob.py    log p of given tokens without ever holding the (T, V) logits
    linear.py     matrix products with few rows, for decoding on a CPU

Nothing here knows of S²R. Dimension letters are those of `s2r/__init__.py`.
"""
