"""The vision transformers, with timm's parameter names, so that the hub's weights load without conversion.

The features are the output of the second-to-last block, without the final norm and without prefix tokens. The last
block, the final norm and the attention pooling are therefore part of every checkpoint, but never run.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_openvla import OpenVLAConfig


@dataclass(frozen=True)
class ViTShape:
    """Shape of a vision transformer, in the words (and with the defaults) of timm's `VisionTransformer`."""

    img_size: int = 224
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    init_values: float | None = None
    class_token: bool = True
    no_embed_class: bool = False
    reg_tokens: int = 0
    pre_norm: bool = False
    global_pool: str = "token"
    act_layer: str | None = None
    norm_eps: float = 1e-6

    @property
    def num_prefix_tokens(self) -> int:
        return int(self.class_token) + self.reg_tokens

    @property
    def num_patches(self) -> int:
        return (self.img_size // self.patch_size) ** 2


_DINOV2 = ViTShape(
    patch_size=14, embed_dim=1024, depth=24, num_heads=16, init_values=1e-5, reg_tokens=4, no_embed_class=True
)
_SIGLIP = ViTShape(
    patch_size=14,
    embed_dim=1152,
    depth=27,
    num_heads=16,
    mlp_ratio=3.7362,
    class_token=False,
    global_pool="map",
)
_CLIP = ViTShape(patch_size=14, embed_dim=1024, depth=24, num_heads=16, pre_norm=True, norm_eps=1e-5)
_IN1K = ViTShape(patch_size=16, embed_dim=1024, depth=24, num_heads=16)
TIMM_SHAPES = {
    "vit_large_patch14_reg4_dinov2.lvd142m": _DINOV2,
    "vit_so400m_patch14_siglip_224": _SIGLIP,
    "vit_so400m_patch14_siglip_384": _SIGLIP,
    "vit_large_patch14_clip_224.openai": _CLIP,
    "vit_large_patch14_clip_336.openai": _CLIP,
    "vit_large_patch16_224.augreg_in21k_ft_in1k": _IN1K,
}


def vit_shape(config: OpenVLAConfig, index: int) -> ViTShape:
    """Shape of the vision transformer `index` (0: featurizer, 1: fused featurizer) of a model.

    Raises:
        ValueError: the timm id is unknown and `tiny_timm_kwargs` does not give its shape, or gives an unknown word.
    """
    assert config.timm_model_ids is not None
    assert config.timm_override_act_layers is not None
    assert config.image_sizes is not None
    timm_id = config.timm_model_ids[index]
    if config.tiny_timm_kwargs is not None:
        given = config.tiny_timm_kwargs[index]
        unknown = set(given) - {field.name for field in fields(ViTShape)}
        if unknown:
            raise ValueError(f"`tiny_timm_kwargs` of '{timm_id}' has unknown entries: {', '.join(sorted(unknown))}.")
        shape = ViTShape(**given)
    elif timm_id in TIMM_SHAPES:
        shape = TIMM_SHAPES[timm_id]
    else:
        raise ValueError(f"Unknown vision transformer '{timm_id}'; known are {', '.join(sorted(TIMM_SHAPES))}.")
    act_layer = config.timm_override_act_layers[index]
    return replace(shape, img_size=config.image_sizes[index], act_layer=act_layer or shape.act_layer)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of the original CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str | None, type[nn.Module]] = {None: nn.GELU, "gelu": nn.GELU, "quick_gelu": QuickGELU}


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        if shape.act_layer not in _ACTIVATIONS:
            raise ValueError(f"Unknown activation '{shape.act_layer}' of a vision transformer.")
        hidden = int(shape.embed_dim * shape.mlp_ratio)
        self.fc1 = nn.Linear(shape.embed_dim, hidden)
        self.act = _ACTIVATIONS[shape.act_layer]()
        self.fc2 = nn.Linear(hidden, shape.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head self-attention with one projection for query, key and value."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (batch, heads, tokens, dim / heads)
        x = F.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    """A learned factor per feature. timm calls it gamma; old versions of transformers renamed that word."""

    def __init__(self, dim: int, init_value: float) -> None:
        super().__init__()
        self.init_value = init_value
        self.scale_factor = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class ViTBlock(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]
    """Attention, then MLP, each on normalised input and added to it; with FiLM, a modulation between the two."""

    def __init__(self, shape: ViTShape, film_dim: int | None) -> None:
        super().__init__()
        dim, scale = shape.embed_dim, shape.init_values
        self.norm1 = nn.LayerNorm(dim, eps=shape.norm_eps)
        self.attn = Attention(dim, shape.num_heads)
        self.ls1 = LayerScale(dim, scale) if scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=shape.norm_eps)
        self.mlp = Mlp(shape)
        self.ls2 = LayerScale(dim, scale) if scale else nn.Identity()
        if film_dim is not None:
            self.scale = nn.Linear(film_dim, dim)
            self.shift = nn.Linear(film_dim, dim)

    def forward(self, x: Tensor, language: Tensor | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        if language is not None:
            gamma, beta = self.scale(language), self.shift(language)  # (batch, dim)
            x = x * (1 + gamma[:, None]) + beta[:, None]
        return x + self.ls2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    """One linear map per patch, as a convolution whose stride is its kernel."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        size = shape.patch_size
        self.proj = nn.Conv2d(3, shape.embed_dim, kernel_size=size, stride=size, bias=not shape.pre_norm)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class AttentionPool(nn.Module):
    """SigLIP's pooling head: parameters of the checkpoint that OpenVLA never uses."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        dim = shape.embed_dim
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=shape.norm_eps)
        self.mlp = Mlp(shape)


class VisionTransformer(nn.Module):
    """timm's `VisionTransformer` up to its second-to-last block.

    Args:
        shape: sizes and variants.
        film_dim: width of the language embedding that modulates each block, None without FiLM.
    """

    def __init__(self, shape: ViTShape, film_dim: int | None = None) -> None:
        super().__init__()
        self.shape = shape
        dim = shape.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if shape.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, shape.reg_tokens, dim)) if shape.reg_tokens else None
        positions = shape.num_patches + (0 if shape.no_embed_class else shape.num_prefix_tokens)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, dim))
        self.patch_embed = PatchEmbed(shape)
        self.norm_pre = nn.LayerNorm(dim, eps=shape.norm_eps) if shape.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(ViTBlock(shape, film_dim) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(dim, eps=shape.norm_eps)
        if shape.global_pool == "map":
            self.attn_pool = AttentionPool(shape)

    def forward(self, pixels: Tensor, language: Tensor | None = None) -> Tensor:
        """Patch features (batch, patches, dim) of normalised images (batch, 3, height, width).

        `language` (batch, film_dim) is the mean language embedding, only with FiLM.
        """
        if torch.is_grad_enabled() and not self._needs_gradient(pixels, language):
            with torch.no_grad():
                return self._features(pixels, language)
        return self._features(pixels, language)

    def _needs_gradient(self, pixels: Tensor, language: Tensor | None) -> bool:
        inputs = pixels.requires_grad or (language is not None and language.requires_grad)
        return inputs or any(parameter.requires_grad for parameter in self.parameters())

    def _features(self, pixels: Tensor, language: Tensor | None) -> Tensor:
        x: Tensor = self.patch_embed(pixels)
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if self.shape.no_embed_class:
            x = torch.cat([*prefix, x + self.pos_embed], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + self.pos_embed
        x = self.norm_pre(x)
        if torch.is_grad_enabled() and self.blocks[0].gradient_checkpointing and not x.requires_grad:
            x.requires_grad_()  # else reentrant checkpointing would drop the gradients of adapters in the blocks
        for block in self.blocks[:-1]:
            x = block(x, language)
        return x[:, self.shape.num_prefix_tokens :]


class VisionBackbone(nn.Module):
    """One or two vision transformers; the patch features of two are concatenated on the feature axis."""

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        film_dim = int(config.text_config.hidden_size) if config.use_film else None
        self.featurizer = VisionTransformer(vit_shape(config, 0), film_dim)
        self.embed_dim = self.featurizer.shape.embed_dim
        self.num_channels = 3
        if config.use_fused_vision_backbone:
            self.fused_featurizer = VisionTransformer(vit_shape(config, 1), film_dim)
            self.embed_dim += self.fused_featurizer.shape.embed_dim
            self.num_channels = 6
        self.num_images = config.num_images_in_input

    def forward(self, pixels: Tensor, language: Tensor | None = None) -> Tensor:
        """Patch features (batch, images * patches, dim) of `pixels` (batch, images * channels, height, width).

        Raises:
            ValueError: the number of channels does not fit the number of images, or the images are of another size.
        """
        if pixels.shape[1] != self.num_images * self.num_channels:
            raise ValueError(
                f"`pixel_values` has {pixels.shape[1]} channels, but {self.num_images} image(s) of "
                f"{self.num_channels} channels each are expected; set `num_images_in_input` of the configuration."
            )
        side = self.featurizer.shape.img_size
        if pixels.shape[2:] != (side, side):  # cut off or repeated by the patches, they would give other actions
            raise ValueError(
                f"`pixel_values` must be of shape (batch, {pixels.shape[1]}, {side}, {side}), got "
                f"{tuple(pixels.shape)}; let the model's processor resize the images."
            )
        pixels = pixels.to(self.featurizer.pos_embed.dtype)
        # One image after the other, as in the original: one large batch would round differently.
        images = torch.split(pixels, self.num_channels, dim=1)
        features = [self._image_features(image, language) for image in images]
        return features[0] if len(features) == 1 else torch.cat(features, dim=1)

    def _image_features(self, image: Tensor, language: Tensor | None) -> Tensor:
        if self.num_channels == 3:
            return self.featurizer(image, language)  # type: ignore[no-any-return]
        first, second = torch.split(image, 3, dim=1)
        return torch.cat([self.featurizer(first, language), self.fused_featurizer(second, language)], dim=2)


class Projector(nn.Module):
    """MLP from patch features to the language model's embedding space: three layers if fused, else two."""

    def __init__(self, vision_dim: int, language_dim: int, fused: bool) -> None:
        super().__init__()
        hidden = 4 * vision_dim if fused else language_dim
        self.fc1 = nn.Linear(vision_dim, hidden)
        self.fc2 = nn.Linear(hidden, language_dim)
        self.fc3 = nn.Linear(language_dim, language_dim) if fused else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(x)))
        return x if self.fc3 is None else self.fc3(F.gelu(x))


def init_vision_weights(module: nn.Module) -> None:
    """timm's initial values of the parameters that are no layer of their own."""
    if isinstance(module, VisionTransformer):
        init.trunc_normal_(module.pos_embed, std=0.02)
        for token in (module.cls_token, module.reg_token):
            if token is not None:
                init.normal_(token, std=1e-6)
    elif isinstance(module, LayerScale):
        init.constant_(module.scale_factor, module.init_value)
    elif isinstance(module, AttentionPool):
        init.trunc_normal_(module.latent, std=module.latent.shape[-1] ** -0.5)
