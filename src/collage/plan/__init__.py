"""`collage plan`: what a model, a strategy and a number of devices need of memory, found without allocating it.

`collage.plan.models` says which model, `collage.plan.trace` what its step keeps, `collage.plan.memory` what that and
the storages of a strategy add up to.
"""
