"""S²R: teaching language models to self-verify and self-correct by reinforcement learning.

Dimension letters, the same in every file:

    T  tokens of a packed batch        D  width of the residual stream
    S  sequences in it; decoding: rows L  layers
    J  spans in it (rl.py)             H  query heads
    Q  scored tokens in it             G  key/value heads
    N  problems per RL step            E  width of one head
    M  rollouts per problem            F  width of the feed-forward layer
    B  trajectories per update (rl.py)
    V  vocabulary                      C  cache capacity in tokens

Importing this package before torch also settles how torch's threads wait for one another and how it allocates on a GPU.
"""

import os

# How often an OpenMP thread spins before it sleeps while it waits for the other threads. libgomp reads this once, when
# torch loads it. The default, hundreds of thousands, makes two threads many times slower as soon as one core has other
# work. No spinning at all costs a fifth of the speed on an idle machine. `tests/benchmark.py` measures it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# The sampler's cache and the trainer's activations take turns on the GPU and have different sizes. With segments that
# can grow, the allocator reuses the one's memory for the other. torch reads this when it first uses a GPU.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
