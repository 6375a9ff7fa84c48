"""Stage 0: from samples and verifications to the trajectories of stage 1, and the selection of problems for RL."""
