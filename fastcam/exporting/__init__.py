"""From a trained model to one ONNX file that explains itself.

In: a Keras model, a torch module or an ONNX model. Out: the file, with logits, activations and pooled gradients.
A model's path: `importers` read it, `passes` clean its graph, `classifier` finds the logits and `layers` the map to
explain, `gradients` append the reverse pass, `outputs` name the results, `float16` converts and `writer` writes.
Imports the ground only; never `kernels`, `pictures` or `explaining`, so that an export needs no compiled code.
"""
