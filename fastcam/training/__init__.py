"""From a folder of photos per class to a trained Keras classifier.

In: photos. Out: a `.keras` file, learning curves, a confusion matrix. Imports `pictures` and the ground.
"""
