"""What `fastcam demo` runs: a trained network explains photos, without a download.

In: the weights and photos that packages ship. Out: overlays and a contact sheet. Imports everything but `cli`.
"""
