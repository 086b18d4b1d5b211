"""What a run leaves behind: checked metric names, a W&B run, a plain copy, pictures and tables.

- ``metrics``: every logged number with its unit and meaning
- ``wandb_run``: the Lightning logger ``Tracker``; ``mirror``: its copy ``metrics.jsonl``; ``samples``: rows of text
- ``offline``: reads an offline run back
- ``figures``, ``console``, ``progress``: what people look at; ``estimate``: how a share with its interval is written

Nothing is imported here, so that a front door starts fast.
"""
