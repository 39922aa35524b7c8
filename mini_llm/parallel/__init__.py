"""Engines: starting Accelerate and DeepSpeed, one optimizer step under any of them, what they hold.

This package knows no concrete model.
"""
