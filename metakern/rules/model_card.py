"""Model cards (README.md) of saved rules."""

from __future__ import annotations

from metakern.rules.protocol import Rule

#: Marks cards written by save_pretrained, which it may overwrite.
MARK = "<!-- written by save_pretrained of metakern, which replaces it -->"


def model_card(rule: Rule) -> str:
    """A card with the rule's description, meta-training (if recorded) and limits."""
    name = type(rule).__name__
    trained = "It is not recorded what this rule was meta-trained on."
    limits = (
        "A learned optimizer serves networks like those that it was meta-trained on, and for as many steps. "
        "Beyond them its loss may stall or rise."
    )
    if rule.trained_on is not None:
        trained = f"Meta-trained on {rule.trained_on.rstrip('.')}."
    if rule.horizon is not None:
        trained += f" Its episodes had {rule.horizon} steps."
        limits += f" LearnedOptimizer warns once after step {rule.horizon}."
    else:
        trained += " It is not recorded for how many steps."
    return f"""---
library_name: metakern
tags:
- learned-optimizer
- meta-learning
---
{MARK}

# {name}

{rule.described()}

## Training

{trained}

## Limits

{limits} For other networks {rule.advice_for_other_networks}.

## Use

```python
import metakern

rule = metakern.rules.load("path/to/this/folder")
optimizer = metakern.optim.LearnedOptimizer(model.parameters(), rule)
```
"""
