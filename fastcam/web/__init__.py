"""A static page that runs an exported file in the browser: nothing leaves the machine.

In: a file that draws its own heatmaps. Out: a folder for any web server: page, model, and ONNX Runtime Web. `site`
builds it, `runtime` obtains ONNX Runtime Web by version and hash, `server` serves the page on this machine. Imports
`pictures` and the ground only.
"""
