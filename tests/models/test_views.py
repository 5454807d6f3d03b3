import pytest
import torch

from megamm.models.inputs import batch_inputs
from megamm.models.views import VIEWS
from tests.support.multimodal import document, pack, tiny_config, tiny_model

MEDIA = {"text": {}, "audio": {"frames": 150}, "image": {"grid": (2, 4)}}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("merge", [1, 2])
def test_stock_class_loads_strictly_and_gives_the_models_logits(name, tied, merge):
    model = tiny_model(tie_word_embeddings=tied, merge=merge).eval()
    view = VIEWS[name]
    stock = view.build(view.config(model.config)).eval()
    state = {new: value for old, value in model.state_dict().items() if (new := view.rename(old)) is not None}
    stock.load_state_dict(state, strict=True)
    one = document(0, 6, merge=merge, **MEDIA[name])
    inputs = batch_inputs(pack([[one]], len(one.ids)), torch.device("cpu"), torch.float32)
    media = {key: value for key, value in inputs.items() if key.startswith(("pixel", "spatial", "input_features"))}
    with torch.no_grad():
        theirs, ours = (one(input_ids=inputs["input_ids"], **media).logits for one in (stock, model))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    assert stock.config.tie_word_embeddings == tied


def test_views_are_offered_only_where_the_model_has_what_they_need():
    def possible(**changes) -> set[str]:
        return {name for name, view in VIEWS.items() if view.is_possible(tiny_config(**changes))}

    assert possible() == {"text", "audio", "image"}
    assert possible(vision="resnet", audio=False) == possible(vision="", audio=False) == {"text"}
