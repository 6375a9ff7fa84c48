"""S²R: teaching language models to self-verify and self-correct by reinforcement learning.

Dimension letters, the same in every file:

    T  tokens of a packed batch        D  width of the residual stream
    S  sequences in it (rows)          L  layers
    A  actions in it, or spans         H  query heads
    K  scored tokens in it
    N  problems per RL step            G  key/value heads
    M  rollouts per problem            E  width of one head
    V  vocabulary                      F  width of the feed-forward layer
    C  cache capacity in tokens

Importing this package before torch also settles how torch's threads wait for one another (below).
"""

import os

# How many times a thread looks again before it sleeps when it waits for the others of a parallel region. Read once, by
# libgomp, when torch loads it. The default, hundreds of thousands, makes two threads many times slower as soon as one
# core has other work; no looking at all costs a fifth on an idle machine. `tests/benchmark.py` measures it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
