"""A reward model as a judge of branches."""

from post_training.data.chat.text_encoder import TextEncoder
from post_training.data.rows import BadRow, Conversation
from post_training.models.device import on_device
from post_training.models.load import check_vocabulary, load_reward_model, load_tokenizer
from post_training.models.positions import check_positions, most_positions
from post_training.models.reward_scores import RewardScorer
from post_training.stages.annotation.annotator import Row
from post_training.stages.rewards.annotator import Judgement
from post_training.stages.rewards.config import RewardConfig, RewardsConfig


def load_judge(reward: RewardConfig, config: RewardsConfig, local_rank: int) -> "ModelJudge":
    """Errors: PostTrainingError for what is no reward model, or a template that doesn't fit."""
    assert reward.model is not None
    path = reward.model.path
    tokenizer = load_tokenizer(path)
    encoder = TextEncoder(tokenizer, reward.chat_template)
    model = load_reward_model(
        path,
        dtype=reward.model.dtype,
        attn_implementation=reward.model.attn_implementation,
        tensor_parallel_size=config.tensor_parallel_size,
    )
    check_vocabulary(model, tokenizer)
    scorer = RewardScorer(
        on_device(model, local_rank),
        max_batch_tokens=config.max_batch_tokens,
        prompts_per_batch=config.prompts_per_batch,
    )
    if reward.max_seq_length is not None:
        where = f"rewards: {reward.name}: max_seq_length"
        check_positions(model.config, reward.max_seq_length, where=where)
    max_length = reward.max_seq_length or most_positions(model.config)
    return ModelJudge(reward.name, encoder, scorer, max_length, marks=reward.overlong == "mark")


class ModelJudge:
    """max_length: of a conversation. marks: a longer one is cut and marked, not refused."""

    def __init__(
        self,
        name: str,
        encoder: TextEncoder,
        scorer: RewardScorer,
        max_length: int | None,
        *,
        marks: bool,
    ):
        self.name = name
        self.num_tokens = 0
        self._encoder = encoder
        self._scorer = scorer
        self._max_length = max_length
        self._marks = marks

    def __call__(
        self, rows: list[Row], conversations: list[list[Conversation]]
    ) -> list[list[Judgement] | BadRow]:
        read: list[list[tuple[list[int], bool]] | BadRow] = []
        for own in conversations:
            try:
                read.append([self._read(conversation) for conversation in own])
            except BadRow as bad:
                read.append(bad)
        groups = [[ids for ids, _ in own] for own in read if not isinstance(own, BadRow) and own]
        rewards = iter(self._scorer.score(groups))
        judged: list[list[Judgement] | BadRow] = []
        for own in read:
            if isinstance(own, BadRow) or not own:
                judged.append(own if isinstance(own, BadRow) else [])
                continue
            marks = [is_cut for _, is_cut in own]
            judged.append(list(zip(next(rewards), marks, strict=True)))
        return judged

    def _read(self, conversation: Conversation) -> tuple[list[int], bool]:
        """(ids, whether they are only the beginning). Errors: BadRow."""
        ids = self._encoder.encode(conversation)
        limit = self._max_length
        is_cut = limit is not None and len(ids) > limit
        if is_cut and not self._marks:
            problem = f"a conversation of {len(ids)} tokens (the limit is {limit})"
            raise BadRow("failed", problem)
        ids = ids[:limit] if is_cut else ids
        self.num_tokens += len(ids)
        return ids, is_cut
