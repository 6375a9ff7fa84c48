"""S²R: teaching language models to self-verify and self-correct by reinforcement learning.

Dimension letters, the same in every file:

    T  tokens of a packed batch        D  width of the residual stream
    S  sequences in it (rows)          L  layers
    A  actions in it                   H  query heads
    N  problems per RL step            G  key/value heads
    M  rollouts per problem            E  width of one head
    V  vocabulary                      F  width of the feed-forward layer
    C  cache capacity in tokens

Importing this package before torch also settles how torch's threads wait for one another (below).
"""

import os

# libgomp reads this once, when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
