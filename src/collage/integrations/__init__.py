"""The audit and the optimizers inside other people's trainers and loggers.

Each module needs the package that it is for: huggingface, lightning; torchtitan and loggers need none of their own.
"""
