"""Rate control: find the quantizer step and the forms of modules that meet a budget or an error target.

`analysis` has what a choice depends on, `mode_decision` chooses in one currency, `terms` are the factors in
steps, `coding` codes a part at one step, `pilot` finds the step of the first pass on a sample, `search` moves
it until the target is met, and `engine` does so for a collection of any size; `distortion` measures what a
store decodes to.
"""
