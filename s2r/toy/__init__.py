"""The toy world: all of S²R on a laptop's CPU, by the same three scripts. Nothing imports this package."""
