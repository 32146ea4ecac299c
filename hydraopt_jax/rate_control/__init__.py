"""Rate control: find the quantizer step and the forms of modules that meet a budget or an error target.

`analysis` computes energies and cosines, `mode_decision` chooses forms by Lagrangian cost, `targets` are
factors in quantizer steps, `coding` codes a collection at one step, `search` finds the step, `engine` runs it
all over the parts of a collection, `errors_of` measures errors.
"""
