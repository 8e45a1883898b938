"""Mirrors of a training in other tools: one small file each, imported by whoever uses it."""
