"""ControlNet (Zhang, Rao, Agrawala; ICCV 2023; arXiv:2302.05543) in torch alone, for any ldm-layout SD UNet."""
