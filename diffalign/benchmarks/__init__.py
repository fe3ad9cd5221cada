"""Published benchmarks of text-to-image models: one file each, with its protocol as data and its aggregation.

A file registers ``@register_benchmark("name", Protocol(...))`` on a function that turns the judges' answers into
figures; the command, its help, the dry run and the tests read the registry.
"""
