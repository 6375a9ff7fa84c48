"""What people look at: tables, trajectories in the terminal and as a web page, curves of a run."""
