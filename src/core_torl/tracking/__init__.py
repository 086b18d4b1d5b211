"""What a run leaves behind: checked metric names, a W&B run, a plain copy, pictures and tables.

- ``metrics``: every logged number, table and file with its meaning
- ``wandb_run``: the Lightning logger ``Tracker``; ``mirror``: its plain copies ``metrics.jsonl`` and ``rollouts.jsonl``
- ``rollouts``: which answers of a step are shown; ``samples``: how an answer reads
- ``artifacts``: files that go to W&B; ``offline``: reads an offline run back
- ``figures``, ``console``, ``progress``: what people look at; ``estimate``: how a share with its interval is written

Nothing is imported here, so that a front door starts fast.
"""
