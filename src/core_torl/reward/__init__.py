"""How a trajectory is scored: what the policy answered, whether that is right, and what it earns.

Nothing is imported here, because every worker process of the verifier passes through this file when it starts.
"""
