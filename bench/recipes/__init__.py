"""Services that do what `fastcam serve` does, written with other servers: for `bench.serving --peers`."""
