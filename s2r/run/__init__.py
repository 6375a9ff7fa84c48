"""How the scripts run: flags, loop, checkpoints, ranks, memory, stages. Nothing of the method is here."""
