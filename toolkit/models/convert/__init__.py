"""Models of fairseq, Hugging Face, torchaudio and SpeechBrain, to and from the toolkit's own."""

from toolkit.models.convert.common import Converted, PretrainedInfo
from toolkit.models.convert.load import load_encoder, load_pretrained
from toolkit.models.convert.read import read_pretrained

__all__ = ["Converted", "PretrainedInfo", "load_encoder", "load_pretrained", "read_pretrained"]
