"""Kinds of models in Hugging Face's format (the model_type of config.json): which ones ours can be,
what a config.json without a key means there, and which only look alike."""

# What we write: model_type -> its class in transformers
CLASSES = {
    'llama': 'LlamaForCausalLM',
    'glm4_moe': 'Glm4MoeForCausalLM',
    'deepseek_v3': 'DeepseekV3ForCausalLM',
}
OURS = 'nanoseek_'          # begins a model_type that Hugging Face has no class for

# What a config.json without the key means, by the config classes of transformers 5
EVERY_DEFAULT = {'initializer_range': 0.02, 'tie_word_embeddings': False, 'rope_theta': 10000.0}
LLAMA = {
    **EVERY_DEFAULT, 'vocab_size': 32000, 'hidden_size': 4096, 'intermediate_size': 11008,
    'num_hidden_layers': 32, 'num_attention_heads': 32, 'max_position_embeddings': 2048,
    'rms_norm_eps': 1e-6, 'bos_token_id': 1, 'eos_token_id': 2}
GLM4_MOE = {
    **EVERY_DEFAULT, 'vocab_size': 151552, 'hidden_size': 4096, 'intermediate_size': 10944,
    'num_hidden_layers': 46, 'num_attention_heads': 96, 'num_key_value_heads': 8,
    'max_position_embeddings': 131072, 'rms_norm_eps': 1e-5, 'n_routed_experts': 128,
    'n_shared_experts': 1, 'num_experts_per_tok': 8, 'moe_intermediate_size': 1408,
    'first_k_dense_replace': 1, 'n_group': 1, 'topk_group': 1, 'norm_topk_prob': True,
    'routed_scaling_factor': 1.0, 'partial_rotary_factor': 0.5}
DEEPSEEK_V3 = {
    **EVERY_DEFAULT, 'vocab_size': 129280, 'hidden_size': 7168, 'intermediate_size': 18432,
    'num_hidden_layers': 61, 'num_attention_heads': 128, 'max_position_embeddings': 4096,
    'rms_norm_eps': 1e-6, 'q_lora_rank': 1536, 'kv_lora_rank': 512,
    'qk_nope_head_dim': 128, 'qk_rope_head_dim': 64, 'v_head_dim': 128,
    'n_routed_experts': 256, 'n_shared_experts': 1, 'num_experts_per_tok': 8,
    'moe_intermediate_size': 2048, 'first_k_dense_replace': 3, 'n_group': 8,
    'topk_group': 4, 'norm_topk_prob': True, 'routed_scaling_factor': 2.5,
    'num_nextn_predict_layers': 1, 'bos_token_id': 0, 'eos_token_id': 1}
SARVAM_MLA = {
    **DEEPSEEK_V3, 'vocab_size': 262144, 'hidden_size': 4096, 'intermediate_size': 16384,
    'num_hidden_layers': 32, 'num_attention_heads': 64, 'q_lora_rank': None,
    'n_routed_experts': 128, 'first_k_dense_replace': 1, 'n_group': 1, 'topk_group': 1,
    'initializer_range': 0.006, 'num_nextn_predict_layers': 0}
YOUTU = {
    **DEEPSEEK_V3, 'vocab_size': 128256, 'hidden_size': 2048, 'intermediate_size': 6144,
    'num_hidden_layers': 32, 'num_attention_heads': 16, 'max_position_embeddings': 131072,
    'bos_token_id': 128000, 'eos_token_id': 128001, 'tie_word_embeddings': True,
    'n_routed_experts': 0, 'n_shared_experts': 0, 'num_nextn_predict_layers': 0}
GLM4_MOE_LITE = {
    **DEEPSEEK_V3, 'vocab_size': 154880, 'hidden_size': 2048, 'intermediate_size': 10240,
    'num_hidden_layers': 47, 'num_attention_heads': 20, 'max_position_embeddings': 202752,
    'rms_norm_eps': 1e-5, 'q_lora_rank': 768, 'qk_nope_head_dim': 192, 'v_head_dim': 256,
    'n_routed_experts': 64, 'num_experts_per_tok': 4, 'moe_intermediate_size': 1536,
    'first_k_dense_replace': 1, 'n_group': 1, 'topk_group': 1, 'routed_scaling_factor': 1.8,
    'num_nextn_predict_layers': 0}
DEEPSEEK_V32 = {
    **DEEPSEEK_V3, 'max_position_embeddings': 163840, 'num_nextn_predict_layers': 0,
    'index_topk': 2048}
GLM_MOE_DSA = {
    **DEEPSEEK_V32, 'vocab_size': 154880, 'hidden_size': 6144, 'intermediate_size': 12288,
    'num_hidden_layers': 78, 'num_attention_heads': 64, 'max_position_embeddings': 202752,
    'rms_norm_eps': 1e-5, 'q_lora_rank': 2048, 'qk_nope_head_dim': 192, 'v_head_dim': 256,
    'n_group': 1, 'topk_group': 1}

# What we read: model_type -> our attention, the defaults of its keys
READABLE = {
    'llama': ('gqa', LLAMA),
    'glm4_moe': ('gqa', GLM4_MOE),
    'deepseek_v3': ('mla', DEEPSEEK_V3),
    'kimi_k2': ('mla', DEEPSEEK_V3),
    'glm4_moe_lite': ('mla', GLM4_MOE_LITE),        # GLM-4.7-Flash
    'sarvam_mla': ('mla', SARVAM_MLA),
    'youtu': ('mla', YOUTU),
    'deepseek_v32': ('mla', DEEPSEEK_V32),          # these two attend to index_topk tokens that an
    'glm_moe_dsa': ('mla', GLM_MOE_DSA),            # indexer chooses: to all, where there are fewer
}
INDEXED = ('deepseek_v32', 'glm_moe_dsa')

# Other keys of the same meaning
ALIASES = {
    'num_experts': 'n_routed_experts',
    'num_local_experts': 'n_routed_experts',
    'num_shared_experts': 'n_shared_experts',
    'num_mtp_layers': 'num_nextn_predict_layers',
}

# What looks like one of these and computes something else
DIFFERENT = {
    'axk1': 'its experts have a norm behind them',
    'axk2': 'its norms and its attention have gates',
    'bailing_hybrid': 'its attention has gates, and is linear in most of its layers',
    'deepseek_v2': 'its router takes a softmax, and does not balance by biases',
    'deepseek_v4': 'its attention is another one',
    'dots1': 'its attention has norms for queries and keys',
    'dots3_note': 'its latents are scaled, and its attention has gates',
    'glm5_next': 'its layers are joined by hyper-connections',
    'hy_v4': 'its attention has gates and sinks',
    'kimi_k25': 'it reads images too',
    'kimi_linear': 'most of its layers have an attention of their own',
    'longcat_flash': 'its latents are scaled, and some of its experts compute nothing',
    'minicpm3': 'its embeddings and what its layers add are scaled',
    'mistral4': 'its router takes a softmax, and its queries are scaled by their position',
    'mistral_large4': 'its queries are scaled by their position, and RoPE is learned',
    'sarvam_moe': 'its attention has norms for queries and keys',
}
