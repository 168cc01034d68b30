"""InfMoE: a model whose experts do not fit the device answers anyway.

`bundle` writes a model as files from which each expert is read alone; a *store* brings experts to where they are computed; and
`stages` has the two halves of a layer, each as a program, with the loop over experts between them. The formulas are those of
the model (`models/`): what is here knows where experts lie, when they come and how they are stored. What becomes of the
results, decoding and scoring, is `inference`'s.
"""
