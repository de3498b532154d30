"""The page arrays on the device. Which page is whose is `jaxllm.engine.page_pool`'s business."""
