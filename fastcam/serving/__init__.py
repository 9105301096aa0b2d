"""Explanations over HTTP: pictures in, scores and heatmaps out.

`models` holds the opened files and replaces them when they change; `scheduling` decides what runs when, and what is
turned away; `pictures` answers `POST /explain` for people and programs with photos, `protocol` and `inference` the Open
Inference Protocol, version 2, for its clients; `app` joins them with `metrics`, limits and a token. Starlette and
uvicorn carry it: no more than routes and a server are needed, and validation is the library's own.

In: requests. Out: JSON, pictures, arrays. Imports `explaining`, `pictures` and the ground.
"""
