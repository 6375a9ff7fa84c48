"""Stage 0: from samples and verifications to the trajectories of stage 1; the selection of problems for RL.

`formula` and `arithmetic` are data by rule, for problems with a formula; `audit` reads checks that follow a rule.
"""
