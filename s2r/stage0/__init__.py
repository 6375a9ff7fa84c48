"""Stage 0: from samples and verifications to the trajectories of stage 1; the selection of problems for RL.

`formula` writes checks and solutions by rule, `arithmetic` calculations to practise; `audit` reads checks that follow a rule.
"""
